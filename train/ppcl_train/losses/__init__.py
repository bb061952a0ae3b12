"""What students and plans are compared with the teacher by, one file each; selectors and stages use both."""
