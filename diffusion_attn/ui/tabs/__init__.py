"""The tabs of the page, one file each: its ``TITLE``, and ``add_tab``, which draws it and says what its buttons do."""
