"""Result files -> Markdown tables and figures: what the rows say, tables, figures, and the command with its pages."""
