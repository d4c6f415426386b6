"""The modules that the scripts share; README.md beside this file says what each one knows."""
