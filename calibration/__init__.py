"""The only folder that needs a GPU: measurements, fits and execution; profiles/ holds their results."""
