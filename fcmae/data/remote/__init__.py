"""Files at URLs: listed, read in parts with retries, and kept in a local cache of bounded size."""
