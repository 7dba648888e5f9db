"""What the HTML pages of Forebay share: figures, tables, how text is written, the style and the template's macros."""
