"""The sections of the page: one section, one file, with its figures and its template."""
