"""Operations of our own: schema, shape rule and eager reference, one file each."""
