"""Pages: the report of a run, the mask painter, and the elements that pages share."""
