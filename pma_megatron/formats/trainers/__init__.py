"""What trainers save around the checkpoint of a format: the folder that they resume from."""
