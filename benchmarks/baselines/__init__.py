"""What drivekd is compared with where no library has it."""
