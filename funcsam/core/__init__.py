"""What everything stands on: the algebra, gradients, arithmetic on trees, schedules and checks."""
