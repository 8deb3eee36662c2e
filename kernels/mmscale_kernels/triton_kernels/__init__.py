"""The Triton kernels, one file per operation; the only modules that import triton.

Each is launched by the operation of the same name one level up, which imports it inside a function: triton is optional. What
strides and sizes follow the width of a row is a `constexpr`: as a runtime integer that 16 does not divide it costs the wide
loads and spills registers.
"""
