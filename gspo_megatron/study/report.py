def write(folder):
    return "no report yet"
