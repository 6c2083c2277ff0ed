"""Triton kernels and their launchers, installed as ``fastres.kernels``.

One module per operator, named like its C++ twin: ``kernels/bn_relu.py`` beside
``csrc/cpu/bn_relu.cpp``. The modules import torch and triton and nothing of fastres; this file
imports neither, so that the package is importable where Triton is not.
"""
