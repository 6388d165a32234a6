"""AdamW with the groups of the paper, and the learning rate."""
