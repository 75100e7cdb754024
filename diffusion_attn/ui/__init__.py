"""The web page: make, enlarge, edit and compare pictures, and see what words attend to."""
