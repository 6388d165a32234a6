"""What is trained: pretraining and fine-tuning."""
