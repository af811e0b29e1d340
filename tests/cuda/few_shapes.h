// Included before all else where the smallest and the largest of the fixed shapes are enough (test_compile.py).
#define KRUIFY_FIXED_SHAPES(_) _(16, 16) _(64, 64)
