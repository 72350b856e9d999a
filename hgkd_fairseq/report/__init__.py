"""``hgkd report``: finished runs side by side, as markdown tables and as one self-contained HTML page."""
