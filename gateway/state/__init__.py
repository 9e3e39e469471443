"""State that outlives the process: who may ask, and what was charged. The only place that imports SQLAlchemy."""
