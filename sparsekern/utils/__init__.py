"""What has nothing to do with sparsity: files, stores, torch's raw functions."""
