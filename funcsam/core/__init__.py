"""The base of the library: the algebra, gradients, arithmetic on trees, schedules and checks."""
