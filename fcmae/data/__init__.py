"""Sources of images, transforms, and batches that are functions of the seed and the step."""
