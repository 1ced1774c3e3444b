"""Stages split over devices, as candidates of a plan.

choice     when a split may win, and why it did
search     the best plan with split stages at one batch size
cheapest   the exact search over stages, devices and splits
fans       what a split stage costs, with its neighbours
parts      the parts built and timed
"""
