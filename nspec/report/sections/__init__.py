"""The sections of the page, a file each: ``section(data)`` gives what the template of the same name shows.

``nspec.report.page`` has their order; a section draws its own figures.
"""
