"""What is asked of the machine: models, routing traces and predictors. Pure data, no clock."""
