"""Report on finished runs: tables, figures and one page."""
