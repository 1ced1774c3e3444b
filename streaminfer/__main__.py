"""`python -m streaminfer` is `streaminfer`."""

from streaminfer.cli import main

if __name__ == "__main__":
    main()
