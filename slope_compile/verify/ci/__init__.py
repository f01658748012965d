"""What a verification tells a CI system: JUnit XML, JSON, SARIF, Markdown, annotations, GitLab's code quality."""
