"""What training knows of a model family; one file a family."""
