"""One batch for every algorithm: token paths become a forest of shared prefixes with streams per visit."""
