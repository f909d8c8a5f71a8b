//! Tables for people.

use serde_json::{Map, Value};

use crate::report::shown;

/// Lines of rows whose columns stand under each other, two spaces apart: the first to the left, the others to the
/// right where all they hold, but for the heading, is numbers.
pub(super) fn lines<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let numeric = |text: &str| text.starts_with(|c: char| c.is_ascii_digit() || "-+±?".contains(c));
    let right: [bool; N] = std::array::from_fn(|column| {
        column > 0 && N > 2 && rows.iter().skip(1).all(|row| numeric(&row[column]))
    });
    let line = |row: &[String; N]| {
        let cells = row.iter().enumerate().map(|(column, text)| {
            let width = widths[column];
            if right[column] { format!("{text:>width$}") } else { format!("{text:<width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// A line for each field of an object that has a value, those of objects in it under its name.
pub(super) fn fields(object: &Map<String, Value>) -> Vec<String> {
    fn flat(under: &str, object: &Map<String, Value>, rows: &mut Vec<[String; 2]>) {
        for (name, value) in object {
            let name = name.replace('_', " ");
            match value {
                Value::Null | Value::Array(_) => {}
                Value::Object(inside) => flat(&format!("{under}{name}: "), inside, rows),
                Value::String(text) => rows.push([format!("{under}{name}"), text.clone()]),
                Value::Number(number) if number.is_f64() => {
                    let number = number.as_f64().unwrap_or(f64::NAN);
                    rows.push([format!("{under}{name}"), shown(number, None)]);
                }
                other => rows.push([format!("{under}{name}"), other.to_string()]),
            }
        }
    }
    let mut rows = Vec::new();
    flat("", object, &mut rows);
    lines(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [["name", "of", "n"], ["a", "teacher", "10"], ["longer", "student", "5"]];
        let lines = lines(&rows.map(|row| row.map(String::from)));
        assert_eq!(lines, ["name    of        n", "a       teacher  10", "longer  student   5"]);
    }

    #[test]
    fn an_object_has_a_line_for_each_value() {
        let object =
            serde_json::json!({"model": "m", "scores": {"kernel_distance": 0.07091}, "none": null});
        let lines = fields(object.as_object().expect("an object"));
        assert_eq!(lines, ["model                    m", "scores: kernel distance  0.0709"]);
    }
}
