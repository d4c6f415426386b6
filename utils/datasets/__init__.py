"""Records: reading data files, templates, encoding."""
