"""What ``dtune doctor`` looks at: this machine, or all nodes of an allocation."""
