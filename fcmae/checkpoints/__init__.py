"""The state of a run and an encoder on disk, and reading such files of others safely."""
