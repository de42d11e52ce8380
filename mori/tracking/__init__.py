"""What a run shows and keeps: TensorBoard, metrics.jsonl, the progress bar, reports."""
