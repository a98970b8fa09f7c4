"""The acceptance check of `launch/gpu_check.sh`: the package on one GPU, with real trainers."""
