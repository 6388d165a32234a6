"""Arrays on disk, read in windows: Zarr folders, HDF5 files and .npy files."""
