"""One file a patch, named like the patch."""
