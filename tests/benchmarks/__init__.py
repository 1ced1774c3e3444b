"""What streaminfer costs, measured against what one would write by hand. `make bench`."""
