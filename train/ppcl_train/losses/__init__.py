"""How far students and plans are from the teacher: one measure a file, shared by selectors and stages."""
