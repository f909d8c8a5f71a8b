//! What a person and a program read of the runs.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Map, Value};

use super::{Figures, Percentiles, Run};

/// All runs, and what they were asked to do.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What was asked.
    #[serde(flatten)]
    pub asked: Asked,
    /// The runs, in the order in which they were made.
    pub runs: Vec<Run>,
}

/// What the runs have in common.
#[derive(Debug, Clone, Serialize)]
pub struct Asked {
    /// This program's version.
    pub version: &'static str,
    /// When it began.
    pub unix_seconds: u64,
    /// The server.
    pub url: String,
    /// Seconds for which each run sends requests.
    pub duration_seconds: f64,
    /// What the arrivals were drawn with.
    pub seed: u64,
    /// Requests that are under way at a time, at most.
    pub connections: usize,
    /// Fields of every request, beside its model and seed.
    pub request: Map<String, Value>,
}

impl Report {
    /// One JSON object.
    ///
    /// # Errors
    /// Never for a report that was measured: it holds no key that is not a string.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// A line for every model of every run, under a line of names. Times are in milliseconds, and empty where
    /// there was no answer.
    pub fn csv(&self) -> String {
        let mut csv = String::from(
            "mix,rate,model,requests,accepted,refused_429,refused_other,failed,images_per_second,\
             p50_ms,p90_ms,p99_ms,max_ms,late_p99_ms\n",
        );
        for run in &self.runs {
            for model in &run.models {
                let Figures { name, accepted, refused_429, refused_other, failed, .. } = model;
                let (requests, images) = (model.requests(), model.images_per_second);
                // Names hold no quotes.
                let _ = write!(csv, "\"{}\",{},{name},{requests},{accepted}", run.mix, run.rate);
                let _ = write!(csv, ",{refused_429},{refused_other},{failed},{images:.3}");
                let times = |percentiles: &Percentiles| {
                    [percentiles.p50, percentiles.p90, percentiles.p99, percentiles.max]
                };
                let latency = model.latency_ms.as_ref().map(times);
                for i in 0..4 {
                    cell(&mut csv, latency.map(|times| times[i]));
                }
                cell(&mut csv, run.late_ms.map(|late| late.p99));
                csv.push('\n');
            }
        }
        csv
    }
}

fn cell(csv: &mut String, milliseconds: Option<f64>) {
    let _ = match milliseconds {
        Some(milliseconds) => write!(csv, ",{milliseconds:.3}"),
        None => write!(csv, ","),
    };
}

impl Run {
    /// A table for people.
    pub fn table(&self) -> String {
        let names = self.models.iter().map(|model| model.name.len());
        let width = names.max().unwrap_or(0).max(5);
        let mut table = format!(
            "{} at {}/s\n{:width$} accepted    429  other failed  images/s    p50    p90    p99    max ms\n",
            self.mix, self.rate, "model"
        );
        for model in &self.models {
            let Figures { name, accepted, refused_429, refused_other, failed, .. } = model;
            let _ = write!(
                table,
                "{name:width$} {accepted:8} {refused_429:6} {refused_other:6} {failed:6} {:9.2}",
                model.images_per_second
            );
            match model.latency_ms {
                Some(Percentiles { p50, p90, p99, max }) => {
                    let _ = writeln!(table, " {p50:6.0} {p90:6.0} {p99:6.0} {max:6.0}");
                }
                None => table.push_str("      -      -      -      -\n"),
            }
            // Where a name stands for one model, there is nothing to tell.
            if model.served_by.len() > 1 {
                let served =
                    model.served_by.iter().map(|(id, requests)| format!("{id} {requests}"));
                let served: Vec<_> = served.collect();
                let _ = writeln!(table, "{:width$} served by: {}", "", served.join(", "));
            }
            if let Some(problem) = &model.first_problem {
                let _ = writeln!(table, "{:width$} first problem: {problem}", "");
            }
        }
        if let Some(Percentiles { p50, p99, max, .. }) = self.late_ms {
            let _ = writeln!(table, "sent late by: p50 {p50:.1}, p99 {p99:.1}, max {max:.1} ms");
        }
        if self.unfinished > 0 {
            let _ = writeln!(table, "{} were under way when it was stopped", self.unfinished);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn run() -> Run {
        let figures = |name: &str, latency_ms| Figures {
            name: name.into(),
            accepted: 7,
            refused_429: 2,
            refused_other: 0,
            failed: 1,
            images_per_second: 1.5,
            latency_ms,
            served_by: BTreeMap::from([("a".into(), 3), ("b".into(), 4)]),
            first_problem: Some("gone".into()),
        };
        let percentiles = Percentiles { p50: 1.0, p90: 2.0, p99: 3.0, max: 4.5 };
        Run {
            mix: "auto=1,b".into(),
            rate: 2.5,
            seconds: 4.0,
            unfinished: 0,
            late_ms: Some(percentiles),
            models: vec![figures("auto", Some(percentiles)), figures("b", None)],
        }
    }

    #[test]
    fn a_line_of_csv_has_a_cell_for_every_name() {
        let asked = Asked {
            version: "0",
            unix_seconds: 1,
            url: "http://host".into(),
            duration_seconds: 4.0,
            seed: 1,
            connections: 2,
            request: Map::new(),
        };
        let report = Report { asked, runs: vec![run()] };
        let csv = report.csv();
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(
            lines[1..],
            [
                "\"auto=1,b\",2.5,auto,10,7,2,0,1,1.500,1.000,2.000,3.000,4.500,3.000",
                "\"auto=1,b\",2.5,b,10,7,2,0,1,1.500,,,,,3.000",
            ]
        );
        let cells = |line: &str| line.split(',').count();
        // The mix holds a comma.
        assert_eq!(cells(lines[0]) + 1, cells(lines[1]));
        let json: Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        assert_eq!(json["url"], "http://host");
        assert_eq!(json["runs"][0]["models"][0]["latency_ms"]["p90"], 2.0);
    }

    #[test]
    fn the_table_tells_who_served_and_what_went_wrong() {
        let table = run().table();
        for part in ["auto=1,b at 2.5/s", "served by: a 3, b 4", "first problem: gone", "late by"] {
            assert!(table.contains(part), "{table}");
        }
    }
}
