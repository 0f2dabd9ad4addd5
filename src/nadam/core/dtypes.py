"""Number formats: what parameters of each are computed in, and the limits of what is computed in."""

# float32, or its upper 24 bits, in two parts: a bfloat16 parameter, and the remainder in memory of its own
SPLIT, SPLIT8 = "bfloat16+16", "bfloat16+8"
# How moments are kept: in the compute dtype; the first one in bfloat16; both in 8 bits (compressed.py).
WIDE, HALF, COMPRESSED = "wide", "bfloat16", "8bit"
# What a kernel computes in, by the format of the parameters; moments, accumulator and average are kept in it, since
# half precision is too coarse to add small numbers up in.
COMPUTE_DTYPE = {
    "float16": "float32",
    "bfloat16": "float32",
    SPLIT: "float32",
    SPLIT8: "float32",
    "float32": "float32",
    "float64": "float64",
}
# Smaller numbers are subnormal: XLA and GPUs may take them for zero.
SMALLEST_NORMAL = {"float32": 2.0**-126, "float64": 2.0**-1022}
LARGEST = {"float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}
# Sums of squares that overflow are taken again of values times this: no square of a finite value overflows then.
SHRINK = {"float32": 2.0**-80, "float64": 2.0**-600}
