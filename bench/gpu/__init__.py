"""What bench/gpu_check.sh needs besides the benchmarks: text, a training, small calls, stand-ins for pytest plugins."""
