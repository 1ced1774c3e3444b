"""A pipeline in simulated time: discrete events over the rules that `runtime` follows.

scenario.py   what a simulation is told          simulator.py  workers, devices, sink → a report
road.py       the life of a micro-batch in it    device.py     which calls a device merges
events.py     time, cores, loops                 tally.py      partitions, and what is counted
whatif.py     change a number by its name        sanity.py     what cannot run
encoded.py    what another edge would cost
"""
