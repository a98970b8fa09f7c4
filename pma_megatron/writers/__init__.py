"""Where people look at their runs: TensorBoard, Weights & Biases, MLflow, DeepSpeed's monitor."""
