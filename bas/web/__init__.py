"""Pages: the report of a run, the mask painter, elements that pages share, and the studio (`studio/`, `static/`)."""
