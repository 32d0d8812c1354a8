"""Everything a person looks at: grids, GIFs, charts, and the template of the report's page."""
