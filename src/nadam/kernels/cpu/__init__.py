"""The passes on the CPU, compiled by Numba, and the machine code of them."""
