"""The sections of ``bench/gpu.py``, and what runs, times and reports them."""
