"""What comes out of a run besides weights: speed, FLOPs, expert load; console, JSONL, TensorBoard, W&B; the report."""
