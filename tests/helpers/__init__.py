"""What tests share: small models and jobs, fixtures, doubles, and the definitions that results are compared with."""
