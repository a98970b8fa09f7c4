"""DeepSpeed checkpoints: a folder per tag, a file per rank, flat partitions of main params."""
